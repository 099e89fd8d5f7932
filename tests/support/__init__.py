"""What tests share: tiny models and data, real ranks, commands, the truth in fp64."""
