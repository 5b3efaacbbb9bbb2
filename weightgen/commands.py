"""What weightgen adds to the `heirloom` command: the function that runs each verb, imported when it runs."""

VERBS = {
    "families": "weightgen.formats:FAMILIES",
    "demo": "weightgen.demo:run",
    "evaluate": "weightgen.generate:evaluate_folder",
    "generate": "weightgen.generate:generate_folder",
    "rank": "weightgen.ranking:command",
    "explore": "weightgen.explore:command",
}
