"""ftlaunch: one YAML recipe in, a verified fine-tuned language model out."""
