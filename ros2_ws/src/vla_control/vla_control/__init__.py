"""The safety controller and the arm drivers."""
