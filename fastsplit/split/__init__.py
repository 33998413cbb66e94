"""What both sides of a split share: plans, the contract of their calls, the arithmetic."""
