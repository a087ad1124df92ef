package budget

import (
	"time"

	"sallyport.dev/segment"
)

// unstated is what the answer to a request may have that says no maximum, or a quarter of the window if that is less. Here the
// budget is no hard one: what the answer has beyond that is taken when it has ended.
const unstated = 4096

// Ask is what is known of a request before it is sent on.
type Ask struct {
	Grant     segment.GrantName
	Budget    segment.Budget // of the grant
	Caller    string
	Operation segment.Operation
	Bytes     int64 // of its body
	// Output is how many tokens each answer may have at most, by the request; 0: it does not say, or not in a way that
	// everybody reads alike.
	Output int64
	// Answers is to how many answers it asks for; 0: one.
	Answers int64
}

// Hold is what a request has taken of a budget of tokens. It goes with the request, and comes back when that has ended.
type Hold struct {
	Account
	Window   time.Time `json:"window"`
	Reserved int64     `json:"reserved"`
	Prompt   int64     `json:"prompt"`           // of this, what stands for the request itself
	Bounded  bool      `json:"bounded"`          // whether the answer can't be longer than the rest
	Embeds   bool      `json:"embeds,omitempty"` // whether the answer has no tokens
}

// Charges are what the request takes, and the hold for what is to be settled; its Window is not known yet. Without a budget of
// tokens it is nil.
//
// A token stands for one byte of the body at least, so that its length is the most that the prompt can be. Where the same text
// is in another form there (an image by its URL, a conversation by its ID), that is an estimate like any other.
func (a Ask) Charges() ([]Charge, *Hold) {
	account := Account{Grant: a.Grant, Caller: a.Caller}
	if a.Budget.Shared {
		account.Caller = ""
	}
	var charges []Charge
	if l := a.Budget.Requests; l != (segment.Limit{}) {
		account.Unit, account.Per = Requests, l.Per
		charges = append(charges, Charge{account, l.Max, 1})
	}
	l := a.Budget.Tokens
	if l == (segment.Limit{}) {
		return charges, nil
	}
	account.Unit, account.Per = Tokens, l.Per
	hold := &Hold{Account: account, Prompt: bounded(a.Bytes), Embeds: a.Operation == segment.Embed}
	hold.Reserved = hold.Prompt
	if hold.Bounded = hold.Embeds || a.Output > 0; !hold.Embeds {
		each := bounded(a.Output)
		if !hold.Bounded {
			each = min(unstated, (l.Max+3)/4)
		}
		hold.Reserved = bounded(hold.Reserved + times(each, max(1, bounded(a.Answers))))
	}
	return append(charges, Charge{account, l.Max, hold.Reserved}), hold
}

// bounded keeps what others say within what can be added up.
func bounded(n int64) int64 { return min(max(0, n), segment.MaxLimit) }

func times(a, b int64) int64 {
	if a > 0 && b > segment.MaxLimit/a {
		return segment.MaxLimit
	}
	return a * b
}

// Seen is what a gateway saw of a request until its end.
type Seen struct {
	Status   int  // of the answer; 0: there was none
	Complete bool // the answer came to its end, and nobody cut it off
	Worked   bool // a backend may have worked although no answer came from it: it was asked
	Bytes    int64
	// Reported are the tokens that the answer itself tells; HasReport says whether it does.
	HasReport     bool
	Input, Output int64
	// Of a stream: how many events there were, and the bytes of the smallest.
	Events, Smallest int64
}

// Used is what the request is taken to have used. What the backend reports of a whole answer counts as it is, be it more or
// less than what was held. Otherwise it is the most that what was seen can stand for, and never less than that.
func (h Hold) Used(s Seen) int64 {
	if s.HasReport && s.Complete {
		return bounded(bounded(s.Input) + bounded(s.Output))
	}
	if (s.Status == 0 || s.Status >= 400) && !s.HasReport && !s.Worked {
		return 0 // the backend refused, or was not asked
	}
	if s.Status < 100 || s.Status >= 400 || s.Events == 0 && !s.Complete {
		// It may have worked on for as long as it could, or has: an answer that is no stream is sent when it is whole.
		return max(h.Reserved, bounded(bounded(s.Input)+bounded(s.Output)))
	}
	if h.Embeds {
		return h.Prompt
	}
	// Every token of an answer adds a byte at least to it. In a stream, what is in the smallest event is there in every one.
	output := bounded(s.Bytes)
	if events := bounded(s.Events); events > 0 {
		output = events + max(0, output-times(events, bounded(s.Smallest)))
	}
	used := bounded(h.Prompt + output)
	if h.Bounded {
		used = min(used, h.Reserved)
	}
	return max(used, bounded(bounded(s.Input)+bounded(s.Output)))
}
