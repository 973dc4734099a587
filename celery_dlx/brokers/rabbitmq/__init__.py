"""RabbitMQ: topology by declaration, capture by confirmed publish, replay by confirm before acknowledge."""
