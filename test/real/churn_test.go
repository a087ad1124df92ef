package real

const churnVariable = "SALLYPORT_TEST_CHURN"

func churn() {}
