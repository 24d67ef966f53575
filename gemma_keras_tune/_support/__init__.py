"""What every room uses: files, memory, quiet starts, pictures, the backend."""
