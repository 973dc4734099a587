"""What RabbitMQ must hold for a policy, what it does hold, and the difference (pure)."""
