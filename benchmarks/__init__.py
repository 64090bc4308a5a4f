"""What the README's figures come from. Run as `python toolbox/_load.py benchmarks.<name>`."""
