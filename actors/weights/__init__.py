"""Policy weights on their way from ranks to generators: tables in one small actor, bytes beside it."""
