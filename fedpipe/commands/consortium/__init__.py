"""Several sites that share no cluster train one model; only changes of its weights travel."""
