package segment

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Budget is how much the callers of a grant may use. The zero value bounds nothing.
type Budget struct {
	Requests, Tokens Limit
	// Shared is whether all callers of the grant share one budget; else each has its own.
	Shared bool
	// Open is whether requests pass uncounted while the counters can't be asked; else they are denied.
	Open bool
}

// IsZero reports whether nothing is bounded.
func (b Budget) IsZero() bool { return b.Requests == Limit{} && b.Tokens == Limit{} }

// Limit is so much in each window. The zero value does not limit.
type Limit struct {
	Max int64
	Per Period
}

// MaxLimit is the largest bound, and more than anything that is counted: Lua and JSON still tell it from its neighbours.
const MaxLimit = 1 << 50

// Period is how long a window is. The zero value is no period.
type Period string

// Windows begin at full minutes and hours, at midnight and on the first of a month, all in UTC.
const (
	Minute Period = "Minute"
	Hour   Period = "Hour"
	Day    Period = "Day"
	Month  Period = "Month"
)

// Periods are the periods that a budget can name, the shortest first.
func Periods() []Period { return []Period{Minute, Hour, Day, Month} }

// Window returns the window that the moment is in: its first moment, and that of the next one.
func (p Period) Window(now time.Time) (start, end time.Time) {
	now = now.UTC()
	switch p {
	case Minute:
		start = now.Truncate(time.Minute)
		return start, start.Add(time.Minute)
	case Hour:
		start = now.Truncate(time.Hour)
		return start, start.Add(time.Hour)
	case Month:
		start = time.Date(now.Year(), now.Month(), 1, 0, 0, 0, 0, time.UTC)
		return start, start.AddDate(0, 1, 0)
	}
	start = time.Date(now.Year(), now.Month(), now.Day(), 0, 0, 0, 0, time.UTC)
	return start, start.AddDate(0, 0, 1)
}

const (
	wordRequests = "requests"
	wordTokens   = "tokens"
	wordShared   = "shared"
	wordOpen     = "open"
)

// String writes the budget as ParseBudget reads it: "requests=60/Minute tokens=100000/Day shared open".
func (b Budget) String() string {
	var words []string
	for _, l := range []struct {
		unit string
		Limit
	}{{wordRequests, b.Requests}, {wordTokens, b.Tokens}} {
		if l.Limit != (Limit{}) {
			words = append(words, fmt.Sprintf("%s=%d/%s", l.unit, l.Max, l.Per))
		}
	}
	if b.Shared {
		words = append(words, wordShared)
	}
	if b.Open {
		words = append(words, wordOpen)
	}
	return strings.Join(words, " ")
}

var errBudget = errors.New("it is no budget")

// ParseBudget reads what String writes of a budget that bounds something, and nothing else.
func ParseBudget(text string) (Budget, error) {
	var b Budget
	for word := range strings.SplitSeq(text, " ") {
		unit, limit, _ := strings.Cut(word, "=")
		most, per, _ := strings.Cut(limit, "/")
		n, err := strconv.ParseInt(most, 10, 64)
		l := Limit{n, Period(per)}
		switch {
		case word == wordShared:
			b.Shared = true
		case word == wordOpen:
			b.Open = true
		case err != nil || !l.valid():
			return Budget{}, fmt.Errorf("read %.100q: %w", text, errBudget)
		case unit == wordRequests:
			b.Requests = l
		default:
			b.Tokens = l
		}
	}
	if b.IsZero() || b.String() != text { // which also takes care of what stands twice, or in another order
		return Budget{}, fmt.Errorf("read %.100q: %w", text, errBudget)
	}
	return b, nil
}

func (l Limit) valid() bool {
	return l.Max > 0 && l.Max <= MaxLimit && slices.Contains(Periods(), l.Per)
}

// MarshalText is String.
func (b Budget) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText is ParseBudget.
func (b *Budget) UnmarshalText(text []byte) (err error) {
	*b, err = ParseBudget(string(text))
	return err
}

// Within reports whether nobody gets more by this budget than by the other, whatever the order of requests.
func (b Budget) Within(other Budget) bool {
	return b.Requests.within(other.Requests) && b.Tokens.within(other.Tokens) && (b.Shared || !other.Shared) && (!b.Open || other.Open)
}

// within: windows of both begin together, and the longest month has 31 days.
func (l Limit) within(other Limit) bool {
	if l == (Limit{}) || other == (Limit{}) {
		return other == Limit{}
	}
	at, than := slices.Index(Periods(), l.Per), slices.Index(Periods(), other.Per)
	if at > than {
		return l.Max <= other.Max
	}
	times := int64(1)
	for _, n := range []int64{60, 24, 31}[at:than] { // minutes of an hour, hours of a day, days of a month
		times *= n
	}
	return l.Max <= other.Max/times
}
