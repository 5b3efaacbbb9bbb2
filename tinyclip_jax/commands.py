"""The verbs of the `heirloom` command that TinyCLIP implements, and the function of each, imported when it runs."""

VERBS = {
    "families": "tinyclip_jax.zoo:FAMILIES",
    "demo": "tinyclip_jax.demo:run",
    "evaluate": "tinyclip_jax.evaluate:evaluate_folder",
    "suite": "tinyclip_jax.suite:evaluate_suite",
}
