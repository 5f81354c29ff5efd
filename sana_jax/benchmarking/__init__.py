"""Full-size and tiny pipelines with random weights, and what ``python -m sana_jax.benchmark`` times of them."""
