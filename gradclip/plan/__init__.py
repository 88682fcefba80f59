"""The plan: from parameters and a configuration to the slots that policies decide on."""
