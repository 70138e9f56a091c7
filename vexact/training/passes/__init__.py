"""The forward that all share, the policy loss on top of it, and draws repeated inside of it."""
