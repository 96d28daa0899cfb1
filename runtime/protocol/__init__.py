"""The protocols of the fused collectives as models that can be run in every order."""
