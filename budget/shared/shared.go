// Package shared keeps the counters of several gateways in Redis, or in what speaks its protocol (Valkey).
//
// It is for the process that runs an Envoy where a budget is one for all gateways. Every change is one script, which Redis runs
// whole or not at all, so two gateways never give the same token twice. Redis must not evict these keys (maxmemory-policy
// noeviction), and forgets what its own persistence forgets.
package shared

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"sallyport.dev/budget"
	"sallyport.dev/segment"
)

var (
	//go:embed reserve.lua
	reserveText string
	//go:embed settle.lua
	settleText string
)

const (
	within    = 250 * time.Millisecond // for one question
	skew      = 10 * time.Second       // between the clocks of a gateway and of Redis
	keyPrefix = "sallyport:budget:"
	maxListed = 100_000
)

// Counters are made by Open. All methods may be called at any time from anywhere.
type Counters struct {
	client          *redis.Client
	reserve, settle *redis.Script
}

// Open returns counters in the Redis of a URL, as in redis://user:password@host:6379/0, or rediss:// with TLS. It does not ask
// whether it is there.
func Open(url string) (*Counters, error) {
	options, err := redis.ParseURL(url)
	if err != nil {
		return nil, fmt.Errorf("open shared budgets: %w", redacted(err, url))
	}
	options.ClientName = "sallyport"
	options.DialTimeout, options.ReadTimeout, options.WriteTimeout, options.PoolTimeout = within, within, within, within
	options.ContextTimeoutEnabled = true
	options.MaxRetries, options.DialerRetries = -1, 1 // a question that was heard must not be asked again: it takes
	options.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return &Counters{redis.NewClient(options), redis.NewScript(reserveText), redis.NewScript(settleText)}, nil
}

// redacted keeps what the URL says out of the error: there may be a password in it.
func redacted(err error, url string) error {
	return errors.New(strings.ReplaceAll(strings.ReplaceAll(err.Error(), strconv.Quote(url), "the URL"), url, "the URL"))
}

// Close ends all connections.
func (c *Counters) Close() error { return c.client.Close() }

// Reserve takes all charges, or none of them. After an error it may have taken them: nobody gets more by that.
func (c *Counters) Reserve(ctx context.Context, now time.Time, charges []budget.Charge) (budget.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	keys := make([]string, len(charges))
	args := []any{now.UnixMilli(), skew.Milliseconds()}
	for i, charge := range charges {
		start, end := charge.Per.Window(now)
		keys[i] = key(charge.Account, start)
		amount, held := min(max(0, charge.Amount), segment.MaxLimit), int64(0)
		if charge.Unit == budget.Tokens {
			held = amount
		}
		args = append(args, charge.Max, amount, held, end.Add(budget.Slack).UnixMilli())
	}
	said, err := c.reserve.Run(ctx, c.client, keys, args...).Int64Slice()
	if err != nil {
		return budget.Answer{}, fmt.Errorf("ask redis: %w", err)
	}
	if len(said) != 1+2*len(charges) {
		return budget.Answer{}, errors.New("ask redis: an answer of another length")
	}
	answer := budget.Answer{Allowed: said[0] == 1}
	for i, charge := range charges {
		start, end := charge.Per.Window(now)
		answer.Balances = append(answer.Balances, budget.Balance{Account: charge.Account, Max: charge.Max,
			Used: said[1+2*i], Held: said[2+2*i], Window: start, Resets: end})
	}
	return answer, nil
}

// Settle gives back what was not used, and takes what was used beyond.
func (c *Counters) Settle(ctx context.Context, now time.Time, s budget.Settlement) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	start, end := s.Per.Window(now)
	keys := []string{key(s.Account, s.Window), key(s.Account, start)}
	if err := c.settle.Run(ctx, c.client, keys, s.Reserved, s.Used, end.Add(budget.Slack).UnixMilli()).Err(); err != nil {
		return fmt.Errorf("ask redis: %w", err)
	}
	return nil
}

// Balances are how all accounts stand, in the order of their names.
func (c *Counters) Balances(ctx context.Context, now time.Time) ([]budget.Balance, error) {
	found := map[budget.Account]budget.Balance{}
	for cursor, first := uint64(0), true; (first || cursor != 0) && len(found) < maxListed; first = false {
		keys, next, err := c.client.Scan(ctx, cursor, keyPrefix+"*", 1000).Result()
		if err != nil {
			return nil, fmt.Errorf("ask redis: %w", err)
		}
		cursor = next
		for _, k := range keys {
			account, window, ok := parseKey(k)
			if !ok || !inWindow(account.Per, window, now) {
				continue
			}
			var f struct {
				Max  int64 `redis:"max"`
				Used int64 `redis:"used"`
				Held int64 `redis:"held"`
			}
			if err := c.client.HMGet(ctx, k, "max", "used", "held").Scan(&f); err != nil {
				return nil, fmt.Errorf("ask redis: %w", err)
			}
			_, end := account.Per.Window(window)
			found[account] = budget.Balance{Account: account, Max: f.Max, Used: f.Used, Held: f.Held, Window: window, Resets: end}
		}
	}
	return budget.Sorted(maps.Values(found)), nil
}

func inWindow(p segment.Period, window, now time.Time) bool {
	start, _ := p.Window(now)
	return start.Equal(window)
}

// key names an account in a window. What stands in braces puts all that one request changes on one machine of a cluster.
func key(a budget.Account, window time.Time) string {
	return fmt.Sprintf("%s{%s %s}:%s:%s:%d", keyPrefix, a.Grant, a.Caller, a.Unit, a.Per, window.Unix())
}

func parseKey(k string) (a budget.Account, window time.Time, ok bool) {
	who, what, ok := strings.Cut(strings.TrimPrefix(k, keyPrefix+"{"), "}:")
	grant, caller, spaced := strings.Cut(who, " ")
	f := strings.Split(what, ":")
	if !ok || !spaced || len(f) != 3 {
		return a, window, false
	}
	n, err := strconv.ParseInt(f[2], 10, 64)
	return budget.Account{Grant: segment.GrantName(grant), Caller: caller, Unit: budget.Unit(f[0]), Per: segment.Period(f[1])},
		time.Unix(n, 0).UTC(), err == nil
}
