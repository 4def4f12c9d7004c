"""Parameters, weights, sequence context, sharding and registries."""
