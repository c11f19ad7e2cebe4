"""The other side of conversations over several turns: what answers the policy, and how messages become tokens."""
