"""What LiT adds to the `heirloom` command: the function that runs each verb, imported when it runs."""

VERBS = {
    "families": "lit_jax.zoo:FAMILIES",
    "demo": "lit_jax.demo:run",
    "evaluate": "lit_jax.evaluate:evaluate_folder",
    "sample": "lit_jax.generate:sample_folder",
    "doctor": "lit_jax.kernels:describe",
}
