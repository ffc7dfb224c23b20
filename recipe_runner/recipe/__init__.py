"""From a YAML file to a resolved, validated recipe. Nothing here imports the ML stack."""
