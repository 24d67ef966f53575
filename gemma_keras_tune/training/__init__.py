"""From pairs to a tuned model: settings, plan, batches, loss, `tune`."""
