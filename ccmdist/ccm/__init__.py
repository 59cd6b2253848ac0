"""The medicine: clinical groups, units, prompt wording, biomarkers and a procedural phantom. Imports no torch."""
