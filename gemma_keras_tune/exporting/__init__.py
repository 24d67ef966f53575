"""Presets, adapters and exports, with receipts, opened in their runtimes."""
