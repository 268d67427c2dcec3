"""Policy weights on their way from ranks to generators and evaluators: tables in one small actor, bytes beside it."""
