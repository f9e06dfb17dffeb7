"""Rewards of RL post-training: judges of one signature, and what a group of pictures adds."""
