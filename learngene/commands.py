"""What learngene adds to the `heirloom` command: the function that runs each verb, imported when it runs."""

VERBS = {
    "families": "learngene.zoo:FAMILIES",
    "demo": "learngene.demo:run",
    "evaluate": "learngene.evaluate:evaluate_folder",
    "expand": "learngene.descendant:expand_folder",
    "compare": "learngene.compare:compare_command",
}
