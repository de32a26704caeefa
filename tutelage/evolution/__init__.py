"""The learning loop's rules: which gaps are worth a student, what a student is called, who is promoted. Pure; no store, no clock."""
