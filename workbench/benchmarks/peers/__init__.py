"""Scripts, one a peer: run by path, because importing `workbench` would give MLX another BLAS."""
