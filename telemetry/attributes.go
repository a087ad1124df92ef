package telemetry

// Every attribute name in use, on spans and in metadata. The generative AI conventions of OpenTelemetry still move:
// when they do, this file changes and no other.
const (
	// OpenTelemetry semantic conventions for generative AI.
	GenAIOperationName = "gen_ai.operation.name"
	GenAIProviderName  = "gen_ai.provider.name"
	GenAIRequestModel  = "gen_ai.request.model"
	GenAIInputTokens   = "gen_ai.usage.input_tokens"
	GenAIOutputTokens  = "gen_ai.usage.output_tokens"

	// OpenTelemetry semantic conventions for databases.
	DBSystemName     = "db.system.name"
	DBCollectionName = "db.collection.name"
	DBOperationName  = "db.operation.name"

	// OpenTelemetry semantic conventions for security rules, events and resources.
	SecurityRuleName = "security_rule.name" // the grant that decided, or the default deny
	EventOutcome     = "event.outcome"      // the verdict
	ServiceName      = "service.name"

	// Ours, set by gateways only.
	SallyportCaller    = "sallyport.caller" // SPIFFE ID
	SallyportEndpoint  = "sallyport.endpoint"
	SallyportOperation = "sallyport.operation"
	SallyportResource  = "sallyport.resource"
)
