"""How far a run's answers can be trusted: its scores against what retraining really does, and the plots of that."""
