"""Methods that train on natural inputs."""
