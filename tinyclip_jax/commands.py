"""What TinyCLIP adds to the `heirloom` command: the function that runs each verb, imported when it runs."""

VERBS = {
    "families": "tinyclip_jax.zoo:FAMILIES",
    "demo": "tinyclip_jax.demo:run",
    "evaluate": "tinyclip_jax.evaluate:evaluate_folder",
    "suite": "tinyclip_jax.suite:evaluate_suite",
}
