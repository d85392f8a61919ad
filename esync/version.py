"""The package's version, readable without importing any dependency."""

VERSION = "0.1.0"
