"""Test plans: prove that a tuned model does what it should, refuses what it must, forgot nothing.

`plans` and `checks` say what is asked and what an answer must be like; `running` asks; `statistics`
judges; `leakage`, `prompting` and `retention` look at what else may explain the result; `results`
holds it, and `reporting` writes it down.
"""
