"""Compare synthetic sets with a real one: adherence to masks, equivalence of biomarkers, appearance, a report."""
