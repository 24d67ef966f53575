"""Helpers for all packages: files, memory, quiet imports, pictures, the backend."""
