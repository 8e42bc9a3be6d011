"""The model, in JAX: network, losses, step, mesh, checkpoints, baselines. Arrays in, arrays out; no file formats."""
