"""The verbs of the `heirloom` command that learngene implements, and the function of each, imported when it runs."""

VERBS = {
    "families": "learngene.zoo:FAMILIES",
    "demo": "learngene.demo:run",
    "evaluate": "learngene.evaluate:evaluate_folder",
    "expand": "learngene.descendant:expand_folder",
    "compare": "learngene.compare:compare_command",
}
