"""Pages about models: what was decided, why, and where the time goes. Needs lutra[report]."""
