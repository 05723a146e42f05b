"""What a pass carries: the scheduler, and the policy that it and the planner share. No torch."""
