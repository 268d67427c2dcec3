"""The learner: objectives, advantages, the FSDP learner group, the driver, configuration, report and command line."""
