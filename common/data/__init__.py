"""From files on disk to photos with their classes, and to gallery and queries."""
