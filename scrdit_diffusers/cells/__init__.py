"""Cells on disk, what is learned from them, and batches of them."""
