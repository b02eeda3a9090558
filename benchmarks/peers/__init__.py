"""Peers in processes of their own, measured in turn with ours."""
