"""Prompt files for OpenRLHF from published data sets. Start with data_prep/simplerl_zoo.py."""
