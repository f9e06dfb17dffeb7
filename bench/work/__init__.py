"""What the suites share: models with random weights, the implementations they are compared to, inputs and subjects."""
