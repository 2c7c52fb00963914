"""Methods that train on adversarial inputs."""
