"""`python -m efae_jax benchmark`: how fast this machine trains, samples, encodes, reads, starts."""
