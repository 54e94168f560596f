"""Casparian Flow on Kubernetes: the kinds it offers and the operator that carries them out."""
