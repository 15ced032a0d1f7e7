"""Programs that draw: results/*.json in, figures out. No torch, no models, no sparse_coding."""
