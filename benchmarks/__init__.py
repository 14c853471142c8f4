"""Speed against other libraries, each in a run of its own: python -m benchmarks.NAME --data FOLDER"""
